"""The routed experts of the model that is pruned: where its files have them, and how they are run one by one."""

"""Dense against sparse under load: `vllm serve` and `vllm bench serve`, each in a process tree that cannot outlive us."""

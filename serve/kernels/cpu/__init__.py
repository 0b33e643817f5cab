"""The product on CPUs."""

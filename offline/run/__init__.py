"""A run of `compress`, from its plan to its work folder."""

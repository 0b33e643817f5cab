"""Whether layers compute what their checkpoint says."""

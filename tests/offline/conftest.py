from families import make_model, text, tiny  # noqa: F401

from compressing import model  # noqa: F401
from families import make_model, text, tiny  # noqa: F401

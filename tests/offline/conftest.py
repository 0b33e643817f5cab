from compressing import model  # noqa: F401
from families import make_model, text, tiny  # noqa: F401
from rotating_heads import by_hand  # noqa: F401
from wrappers import tiny_wrapper  # noqa: F401

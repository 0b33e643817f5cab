"""How far the student's predictions are from the teacher's."""

import torch

# Logits that are handled at a time: their float32 copies stay in a core's cache. GPUs need more to do at once.
BLOCK, GPU_BLOCK = 1 << 17, 1 << 26


@torch.no_grad()
def divergence(
    teacher: torch.Tensor,
    student: torch.Tensor,
    slope: torch.Tensor | None = None,
    following: torch.Tensor | None = None,
) -> torch.Tensor:
    """KL(teacher, student) of each token in nats: float32 [tokens], whatever the dtype of the logits.

    What the teacher excludes (a logit of -inf) counts as nothing.

    Args:
        teacher, student: logits [tokens, vocabulary].
        slope: like `student`; filled with the gradient of the sum over tokens in the student's logits, which is the
            difference of both models' probabilities. None: it is not needed.
        following: int64 [tokens]; if given, the result is float32 [3, tokens]: the divergence, and the student's and
            the teacher's cross-entropy with them.
    """
    all_three = torch.empty(3, len(student), device=student.device)
    found = all_three[0]
    step = max(1, (BLOCK if student.device.type == "cpu" else GPU_BLOCK) // student.shape[-1])
    for first in range(0, len(student), step):
        rows = slice(first, first + step)
        logs, wanted = (torch.log_softmax(logits[rows].float(), -1) for logits in (student, teacher))
        probable = wanted.exp()
        found[rows] = torch.sub(wanted, logs).mul_(probable).sum(-1)
        if not bool(found[rows].isfinite().all()):  # a second pass only where something is excluded: it is slow
            terms = torch.where(probable == 0, 0.0, probable * (wanted - logs))  # NaN stays NaN
            found[rows] = terms.sum(-1)
        if following is not None:
            for entropy, logarithms in zip(all_three[1:], (logs, wanted), strict=True):
                entropy[rows] = -logarithms.gather(1, following[rows, None])[:, 0]
        if slope is not None:
            slope[rows] = logs.exp_().sub_(probable)
    return found if following is None else all_three

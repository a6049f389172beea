"""A filter of one's own: min-p, which keeps what is likely beside the likeliest."""

from torch import Tensor


class MinP:
    """Keep the codes whose probability is at least `share` of the largest one's: many where nothing stands out.

    In a workflow, task.model.kwargs:

        forecast: {top_p: 1.0, filter: {class: MinP, module_path: examples/min_p_filter.py, kwargs: {share: 0.1}}}
    """

    def __init__(self, share: float = 0.1) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share should lie above 0 and up to 1; it is {share}")
        self.share = share

    def __call__(self, probabilities: Tensor) -> Tensor:
        """Weigh codes: probabilities [B, R, V], each row summing to 1; weights of the same shape."""
        return probabilities * (probabilities >= self.share * probabilities.amax(-1, keepdim=True))

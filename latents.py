"""The stochastic half of a state: what is drawn, and how far two beliefs about it are apart.

A belief is a tensor (..., S, P) of the parameters of S independent distributions, a draw is
(..., S, K). `OneHots` and `Normals` offer the same functions, so the RSSM knows no difference.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LATENTS = ("deter", "stoch", "vectors")  # what a row of the replay holds of the world model's state


def uniform_mix(logits: Tensor, mix: float) -> Tensor:
    """Log-probabilities (..., K) of the softmax mixed with `mix` of the uniform distribution."""
    if not mix:
        return logits.float().log_softmax(-1)  # finite, however sure
    probs = _softmax(logits.float())
    return torch.log((1 - mix) * probs + mix / logits.shape[-1])


def _softmax(logits: Tensor) -> Tensor:
    if logits.is_cuda:
        return logits.softmax(-1)
    # On CPUs torch's own takes several times as long over so few classes.
    return torch.exp(logits - logits.logsumexp(-1, keepdim=True))


def sample_one_hot(log_probs: Tensor) -> Tensor:
    """Draw one-hot vectors (..., K) whose gradient is that of the probabilities."""
    probs = log_probs.exp()
    uniform = torch.rand_like(probs[..., :1])
    # The last class takes what rounding leaves, hence the sum over all but it.
    index = (probs[..., :-1].detach().cumsum(-1) <= uniform).sum(-1)
    one_hot = F.one_hot(index, probs.shape[-1]).to(probs.dtype)
    return one_hot + (probs - probs.detach())


class OneHots:
    """S categoricals of K classes (Hafner et al., arXiv 2010.02193), drawn as one-hot vectors.

    A belief holds log-probabilities (..., S, K). Draws carry the straight-through gradient.
    """

    def __init__(self, count: int, classes: int, mix: float, sharpness: float):
        self.shape = self.parameters = (count, classes)
        self.mix, self.sharpness = mix, sharpness

    def belief(self, raw: Tensor) -> Tensor:
        """What a network's output (..., S, K) says."""
        # The straight-through gradient sees the mean of a code but not its noise: codes stay about
        # as noisy as they begin. `sharpness` lets them begin with less.
        return uniform_mix(self.sharpness * raw, self.mix)

    def sample(self, belief: Tensor) -> Tensor:
        """A draw (..., S, K)."""
        return sample_one_hot(belief)

    def kl(self, left: Tensor, right: Tensor) -> Tensor:
        """The divergence (...) of belief `left` from belief `right`, summed over S."""
        return (left.exp() * (left - right)).sum((-2, -1))

    def entropy(self, belief: Tensor) -> Tensor:
        """(...), in nats, summed over S."""
        return -(belief.exp() * belief).sum((-2, -1))

    def pack(self, stoch: Tensor) -> Tensor:
        """A draw as the replay stores it: the index (..., S) of each category."""
        return stoch.argmax(-1).to(torch.uint8)

    def unpack(self, stored: Tensor) -> Tensor:
        """The draw that `pack` stored."""
        return F.one_hot(stored.long(), self.shape[1]).float()


class Normals:
    """S normals, as Dreamer had them before its codes (Hafner et al., arXiv 1912.01603); K is 1.

    A belief holds mean and deviation (..., S, 2). The gradient of a draw is exact and sees its
    noise, so that precise beliefs pay.
    """

    def __init__(self, count: int, min_std: float = 0.1):
        self.shape, self.parameters = (count, 1), (count, 2)
        self.min_std = min_std

    def belief(self, raw: Tensor) -> Tensor:
        """What a network's output (..., S, 2) says; deviations begin near 1."""
        mean, width = raw.float().unbind(-1)
        return torch.stack([mean, 2 * torch.sigmoid(width / 2) + self.min_std], -1)

    def sample(self, belief: Tensor) -> Tensor:
        """A draw (..., S, 1)."""
        mean, std = belief.split(1, -1)
        return mean + std * torch.randn_like(mean)

    def kl(self, left: Tensor, right: Tensor) -> Tensor:
        """The divergence (...) of belief `left` from belief `right`, summed over S."""
        (mean, std), (mean_, std_) = left.unbind(-1), right.unbind(-1)
        ratio = (std / std_).square()
        return 0.5 * (ratio + ((mean - mean_) / std_).square() - 1 - ratio.log()).sum(-1)

    def entropy(self, belief: Tensor) -> Tensor:
        """(...), in nats, summed over S."""
        return (belief[..., 1].log() + 1.4189385).sum(-1)  # 0.5 ln(2 pi e)

    def pack(self, stoch: Tensor) -> Tensor:
        """A draw as the replay stores it: (..., S) in half precision."""
        return stoch.squeeze(-1).half()

    def unpack(self, stored: Tensor) -> Tensor:
        """The draw that `pack` stored, rounded."""
        return stored.float().unsqueeze(-1)

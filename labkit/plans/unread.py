"""A Linear whose weight stays in its file and is read at each use, to calibrate a model larger than memory."""

from collections.abc import Callable

from torch import Tensor, nn


class UnreadLinear(nn.Linear):
    """Replaces ``linear`` (which may be on the meta device) until it is quantized.

    Args:
        linear: the Linear, for its sizes.
        read: returns the tensor ``weight`` [N, K] or ``bias`` [N], as stored.
    """

    def __init__(self, linear: nn.Linear, read: Callable[[str], Tensor]) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._read = read
        bias = nn.Parameter(read("bias"), requires_grad=False) if linear.bias is not None else None
        self.register_parameter("bias", bias)
        self.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """The stored weight; each access reads the file."""
        return self._read("weight")

    def read(self) -> nn.Linear:
        """A Linear that holds its weight."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        linear.bias = self.bias
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x)
        return nn.functional.linear(x, self.weight.to(x), bias)


def at_hand(linear: nn.Linear) -> nn.Linear:
    """The Linear with its weight in memory."""
    return linear.read() if isinstance(linear, UnreadLinear) else linear

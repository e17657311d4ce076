"""First-order MAML (Finn, Abbeel & Levine, ICML 2017, section 5.2)."""

from typing import TYPE_CHECKING

from maml.learners.maml import Maml

if TYPE_CHECKING:
    from maml.settings.settings import Settings


class Fomaml(Maml):
    """MAML whose inner gradients are held constant: one `tf.stop_gradient` in `Maml.descended`.

    The meta-gradient is then the query loss's gradient at the fast weights θ′.
    """

    def __init__(self, network, loss, *, first_order: bool = True, **options):
        """Takes the arguments of `Maml`."""
        super().__init__(network, loss, first_order=first_order, **options)

    @classmethod
    def arguments(cls, settings: "Settings") -> dict[str, object]:
        """Those of `Maml`, first order whatever `--stop_grad` is."""
        return super().arguments(settings) | {"first_order": True}

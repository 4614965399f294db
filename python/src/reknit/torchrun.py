"""``python -m reknit.torchrun`` is torchrun that knows the backend ``reknit``, for PyTorch 2.4 and 2.5.

From 2.6 on, torchrun finds the backend by itself.
"""

from torch.distributed.elastic.rendezvous import rendezvous_handler_registry
from torch.distributed.run import main as torchrun

from .backend import create_handler


def main() -> None:
    """Registers the backend, then does what torchrun does."""
    rendezvous_handler_registry.register("reknit", create_handler)
    torchrun()


if __name__ == "__main__":
    main()

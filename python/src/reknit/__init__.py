"""reknit: elastic rendezvous for training jobs on machines that come and go.

With this package installed, ``torchrun --rdzv-backend=reknit`` works; nothing has to be imported. See
:mod:`reknit.rendezvous` for its options.
"""

from importlib.metadata import version

__version__ = version("reknit")

__all__ = ["__version__"]

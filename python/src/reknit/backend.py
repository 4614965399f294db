"""What the entry point ``torchrun.handlers`` names.

torchrun loads it while its own package of rendezvous is only half there, so nothing of torch's is imported before a handler is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters


def create_handler(params: RendezvousParameters) -> RendezvousHandler:
    """Makes the handler of one torchrun agent.

    Raises:
        reknit.options.OptionError: The command line makes no sense.
    """
    from .options import parse
    from .rendezvous import ReknitHandler

    options = parse(params.endpoint, params.config, params.local_addr)
    return ReknitHandler(params.run_id, params.min_nodes, params.max_nodes, options)


def entry_point() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """What torchrun calls; it registers what this returns."""
    return create_handler

# SPDX-License-Identifier: Apache-2.0
"""zipfast in the ``Trainer`` of transformers: tickets, LogME of a run, and a greedy soup as training goes.

What a callback has to remember travels in the checkpoint's own trainer_state.json, a soup's ingredients stay in its folder:
so a resumed run is the run that was not interrupted; scoring and souping take no random number from the training. Needs
transformers >= 4.57, < 6; the Trainer itself needs accelerate.
"""

from ...pretrained import save_pretrained
from .images import data_options
from .logme import LogMECallback
from .soup import GreedySoupCallback, metric_of
from .ticket import TicketCallback

__all__ = ["GreedySoupCallback", "LogMECallback", "TicketCallback", "data_options", "metric_of", "save_pretrained"]

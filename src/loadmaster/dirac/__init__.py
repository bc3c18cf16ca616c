"""DIRAC's door: its dictionaries, its words, its way of returning errors, its synchronous coordinators.

Nothing of DIRAC is imported. Its words stay in this package; the rest of the house knows only our own types.
"""

from loadmaster.dirac.legacy import EWMSRESC, adapt, environment, is_synchronous, split_wrapper_file
from loadmaster.dirac.status import Statuses, statuses
from loadmaster.dirac.words import MAY_FOLLOW, JobStatus, Major, Minor

__all__ = [
    "EWMSRESC",
    "MAY_FOLLOW",
    "JobStatus",
    "Major",
    "Minor",
    "Statuses",
    "adapt",
    "environment",
    "is_synchronous",
    "split_wrapper_file",
    "statuses",
]

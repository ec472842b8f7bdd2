"""Privacy accountants: numpy and scipy only. Imported as ``dpkit.accountants``.

Events (`Gaussian`, `PoissonSampled`, ...) say what was done; accountants (`RDPAccountant`, ...) judge it.
"""

from .accountant import Accountant
from .calibration import calibrate, epsilon, make_accountant
from .errors import AccountingError, UnreachableTargetError, UnsupportedEventError
from .events import Composed, Event, Gaussian, Laplace, PoissonSampled, Repeated, dpsgd
from .pld import PLDAccountant
from .rdp import RDPAccountant

__all__ = [
    "Accountant",
    "AccountingError",
    "Composed",
    "Event",
    "Gaussian",
    "Laplace",
    "PLDAccountant",
    "PoissonSampled",
    "RDPAccountant",
    "Repeated",
    "UnreachableTargetError",
    "UnsupportedEventError",
    "calibrate",
    "dpsgd",
    "epsilon",
    "make_accountant",
]

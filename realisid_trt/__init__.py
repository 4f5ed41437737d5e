"""RealisID as a deployment SDK: pictures of given persons, each at a given place, pose and expression.

from realisid_trt import Engine, Person
engine = Engine.load("engines/miniature")
result = engine.generate("two friends hiking", [Person("alice.jpg", box=(…)), Person("bob.jpg", box=(…))], seed=7)
result.images[0].save("out.png")
"""

import os as _os

if not _os.path.isdir(_os.path.join(__path__[0], "kernels")) and _os.path.isfile(
    _os.path.join(_os.path.dirname(__path__[0]), "kernels", "kernels.cu")
):  # a source tree: realisid_trt.kernels lies beside this folder, as setup.py has it
    __path__.append(_os.path.dirname(__path__[0]))

from .engine import Engine
from .errors import RealisIDError
from .loop.samplers import Sampler
from .loop.work import Work
from .persons.identity import Identity
from .persons.person import Person
from .request import Control, Request, Result

__version__ = "0.7.0"
__all__ = [
    "Control",
    "Engine",
    "Identity",
    "Person",
    "RealisIDError",
    "Request",
    "Result",
    "Sampler",
    "Work",
    "__version__",
]

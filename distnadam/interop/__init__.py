"""Checkpoints to and from other frameworks' optimizers: what carries over exactly, and what is
refused or said by name.

    export_checkpoint(checkpoint, output, to="torch")               a file that the framework
    continues from import_checkpoint(file, directory, source_format="torch")       a checkpoint that
    `DistNadam.restore` continues from load_checkpoint(path)
    the state in memory, for `keras.weights`, `keras.variables`,
                                                                    `torch.state_dict` and
                                                                    `optax.opt_state`

What each framework's "Nadam" is, in `formulas`; a framework is imported where it is needed, and
most files need none.
"""

from distnadam.interop.convert import (
    FORMATS,
    Converted,
    Format,
    export_checkpoint,
    import_checkpoint,
)
from distnadam.interop.optimizer_state import OptimizerState, load_checkpoint

__all__ = [
    "FORMATS",
    "Converted",
    "Format",
    "OptimizerState",
    "export_checkpoint",
    "import_checkpoint",
    "load_checkpoint",
]

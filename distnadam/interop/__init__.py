"""Checkpoints to and from other frameworks' optimizers, exactly or refused with the reason.

    export_checkpoint(checkpoint, output, to="torch")          write a file for torch
    import_checkpoint(file, directory, source_format="torch")  write a checkpoint from such a file
    load_checkpoint(path)                                      return the state in memory, for
                                                               `keras.weights`, `keras.variables`,
                                                               `torch.state_dict`, `optax.opt_state`

`formulas` says which framework computes which `NadamConfig.formula`, and where they differ. A
framework is imported only where it is needed; most files need none.
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

"""TensorFlow's Keras Nadam as a sharded parameter server on Ray, or in this process. Importing this
imports no Ray and no framework.
"""

from distnadam.config import Options
from distnadam.optimizer import DistNadam
from distnadam.training.fit import fit
from distnadam.training.task import Task
from distnadam.worker import Worker

__all__ = ["DistNadam", "Options", "Task", "Worker", "fit"]

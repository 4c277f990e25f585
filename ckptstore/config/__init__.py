"""Settings from a file, a dict and the environment, all checked before a run begins.

>>> from ckptstore import config
>>> made = config.parse({"save": "every(steps=250)", "run": {"total_steps": 1000}}, environment={})
>>> made.save.steps(length=made.run.length())
[250, 500, 750, 1000]
"""

from __future__ import annotations

from ckptstore.config.loading import load, parse
from ckptstore.config.settings import Config, Parts, Run
from ckptstore.config.template import draft
from ckptstore.config.write import write_new, write_steps

__all__ = ["Config", "Parts", "Run", "draft", "load", "parse", "write_new", "write_steps"]

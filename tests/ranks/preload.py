"""What every rank needs, imported once."""

import ckptstore.state.capture
import ckptstore.trainer.checkpointer  # noqa: F401
import tests.ranks.processes  # noqa: F401

"""What our programs import of others': loaded once, for the processes that `tests.forked` starts.

Nothing of ours: that is imported anew in each of them.
"""

import os
import tempfile

for name in [name for name in os.environ if name.startswith("TF_")]:
    del os.environ[name]
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

# TensorFlow writes to the file descriptor while it loads.
shown = os.dup(2)
with tempfile.TemporaryFile() as unseen:
    os.dup2(unseen.fileno(), 2)
    import keras  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import PIL.Image  # noqa: F401
    import tensorflow  # noqa: F401
os.dup2(shown, 2)
os.close(shown)

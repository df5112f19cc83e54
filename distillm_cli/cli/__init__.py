"""The command line. It reports plug-ins that cannot be loaded itself, so that Python's own warnings of them are silent."""

import warnings

warnings.filterwarnings("ignore", message="plug-in .* cannot be loaded")

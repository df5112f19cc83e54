"""Provide the command line. It reports plug-ins that cannot be loaded itself, so Python's warnings are filtered out."""

import warnings

warnings.filterwarnings("ignore", message="plug-in .* cannot be loaded")

"""Provide the command line. It reports plug-ins that cannot be loaded, so Python's warnings about them are hidden."""

import warnings

warnings.filterwarnings("ignore", message="plug-in .* cannot be loaded")

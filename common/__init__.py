"""Code shared by all papers: label noise, data sets, augmentation, devices, runs, the command line."""

import sys

if sys.platform == "win32":
    print(
        "error: Windows is not supported: use Linux, macOS, or Windows Subsystem for Linux (WSL)",
        file=sys.stderr,
    )
    sys.exit(2)

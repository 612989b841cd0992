"""What ms-swift takes as `--external_plugins`. It puts this file's directory on sys.path, so nothing else lies here."""

import sdkernels.integrations.swift  # noqa: F401

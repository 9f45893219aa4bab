# SPDX-License-Identifier: Apache-2.0
"""``python -m zipfast``, the same as the ``zipfast`` command."""

from .cli import main

raise SystemExit(main())

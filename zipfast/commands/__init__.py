# SPDX-License-Identifier: Apache-2.0
"""The commands of ``zipfast``, one module each; `common` holds what all of them share."""

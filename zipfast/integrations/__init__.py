# SPDX-License-Identifier: Apache-2.0
"""zipfast inside other libraries, one module each: ``transformers`` (Trainer callbacks), ``timm`` (models by name),
``sklearn`` (estimators). A module imports its library when it is imported itself, and zipfast imports none of them."""

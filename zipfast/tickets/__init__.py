# SPDX-License-Identifier: Apache-2.0
"""Lottery tickets: masks, and the layers that compute with what survives them."""

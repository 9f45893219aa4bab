# SPDX-License-Identifier: Apache-2.0
"""Lottery tickets: sparse subnetworks that train as well as the dense network they were found in."""

# SPDX-License-Identifier: Apache-2.0
"""Operators under the layers: argument checks, the choice of a backend, and the backends."""

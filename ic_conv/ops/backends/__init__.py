# SPDX-License-Identifier: Apache-2.0
"""One file per backend and operator; each owns its autograd.Function."""

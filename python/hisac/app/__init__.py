# SPDX-License-Identifier: Apache-2.0
"""The command line and the demo: files in, files out. Nothing of the library imports this."""

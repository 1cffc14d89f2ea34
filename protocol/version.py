"""The version of this distribution; the build reads it from here.

A constant, because asking the package's metadata costs a tenth of the time that `initialize` may take.
"""

VERSION = "0.1.0"

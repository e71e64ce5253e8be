"""Default arguments of the public functions, each stated once."""

# Added to the denominators.
EPS = 1e-6
FEATURE_MAP = 'elu'

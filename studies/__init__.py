"""Studies that train models, measure them and fill a page with what they find: ``python -m studies.NAME``."""

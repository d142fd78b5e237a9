"""One training method per file; `train.catalog` names them."""

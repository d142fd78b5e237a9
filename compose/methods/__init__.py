"""One composition method per file; `compose.catalog` names them."""

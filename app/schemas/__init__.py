"""What the HTTP interface takes and gives, as pydantic models. Requests refuse unknown fields."""

"""Numbers of real devices: dataclasses that name symbol, unit and source of every constant."""

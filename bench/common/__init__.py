"""What every command shares: options, records, tables, timing, accuracy, the machine."""

"""Generated from protos/cortex/v1 by `make proto`; never edited."""

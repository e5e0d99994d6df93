"""The losses over prototypes and memory banks; `reference` has them as one reads them in a paper."""

"""Examples of dpkit: public API only, each read in one sitting."""

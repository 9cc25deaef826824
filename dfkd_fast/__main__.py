from dfkd_fast.cli import main

main()

import os

from dfkd_fast.cli import main

if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun shows the traceback of the first process that fails
    from torch.distributed.elastic.multiprocessing.errors import record

    main = record(main)

main()

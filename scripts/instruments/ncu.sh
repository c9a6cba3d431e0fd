. .gpu/env.sh; export ETAP_LIBRARY=$PWD/.gpu/libs/$1.so; shift
for s in "$@"; do echo "== $s"; ncu --clock-control none --metrics group:smsp__pcsamp_warp_stall_reasons,gpu__time_duration.sum,lts__t_sectors_op_read.sum,lts__t_sectors_op_write.sum,dram__bytes_read.sum,l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum,l1tex__t_requests_pipe_lsu_mem_global_op_ld.sum,sm__inst_executed.sum,sm__cycles_elapsed.max,l1tex__data_pipe_lsu_wavefronts.sum,l1tex__data_pipe_lsu_wavefronts_mem_shared.sum,l1tex__data_bank_reads.sum,l1tex__data_bank_writes.sum,l1tex__data_bank_conflicts_pipe_lsu.sum,sm__inst_executed_pipe_lsu.sum,sm__icc_requests.sum,sm__icc_requests_lookup_hit.sum,sm__icc_requests_lookup_miss.sum,idc__requests.sum,gcc__requests.sum -k regex:"$K" -s 1 -c 1 --csv --page raw python3 .gpu/one.py $s 2>&1 | python3 -c "
import sys,csv
rows=[r for r in csv.reader(l for l in sys.stdin if l.startswith('\"'))]
h=rows[0]; v=rows[2]
for a,b in zip(h,v):
    if 'pcsamp' in a or 'sum' in a or 'elapsed' in a: print('  ',a,b)
" ; done

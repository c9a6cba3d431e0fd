. .gpu/env.sh
while read lib shape k; do
ETAP_LIBRARY=$PWD/.gpu/libs/$lib.so timeout 60 ncu --clock-control none --section SourceCounters --warp-sampling-interval 0 -k regex:"$k" -s 1 -c 1 -o /tmp/$lib-$shape python3 .gpu/one.py $shape > /tmp/log 2>&1 || tail -5 /tmp/log
ncu -i /tmp/$lib-$shape.ncu-rep --page source --csv --print-source sass > $OUT/$lib-$shape.csv 2>/tmp/log; wc $OUT/$lib-$shape.csv
done <<'L'
lists1 e4m3_656-64x2048-h128-sparse rows_on_m
lists1 e4m3_656-8x2048-h8-sparse e4m3_split
lists1 e4m3-16x1K-h16 e4m3_split
L
gzip $OUT/*.csv

# abl.sh "LIB LIB" ROUNDS SHAPE..: libraries in turn
. .gpu/env.sh
libs=$1; rounds=$2; shift 2
for r in $(seq $rounds); do for l in $libs; do
  ETAP_LIBRARY=$PWD/.gpu/libs/$l.so python3 .gpu/ab.py "$@" 2> .gpu/err_$l.txt > .gpu/out_$l.$r.txt || tail -5 .gpu/err_$l.txt
done; done
for l in $libs; do grep -h error .gpu/err_$l.txt | sed "s/^/$l /"; done
python3 - "$libs" $rounds <<'P'
import sys,collections
libs=sys.argv[1].split(); R=int(sys.argv[2]); t=collections.defaultdict(dict)
for l in libs:
    for r in range(1,R+1):
        for line in open(f'.gpu/out_{l}.{r}.txt'):
            n,u=line.split()[:2]; t[n].setdefault(l,[]).append(float(u))
print(' '.join(['shape']+libs))
for n,d in t.items(): print(n,' '.join(f"{min(d.get(l,[0])):.1f}" for l in libs))
P

import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.time.Instant;
import org.apache.flink.configuration.Configuration;
import org.apache.flink.table.api.EnvironmentSettings;
import org.apache.flink.table.api.StatementSet;
import org.apache.flink.table.api.TableEnvironment;

/**
 * Flink as a contender of ci/bench-stream: the same events from the same Avro file, the same three kinds of windows, in one process
 * with one slot per core that it is given. Arguments: the folder of the run, the folder for the windows, the parallelism.
 *
 * <p>Windows of page and region share one scan. Checkpoints are off, so it gives no guarantee that ours gives; that is in its favour.
 */
public class FlinkPeer {
    public static void main(String[] arguments) throws Exception {
        Path in = Path.of(arguments[0]).toAbsolutePath(), out = Path.of(arguments[1]).toAbsolutePath();
        Configuration settings = new Configuration();
        settings.setString("parallelism.default", arguments[2]);
        settings.setString("table.exec.mini-batch.enabled", "true");
        settings.setString("table.exec.mini-batch.allow-latency", "1 s");
        settings.setString("table.exec.mini-batch.size", "50000");
        settings.setString("pipeline.object-reuse", "true");
        settings.setString("table.local-time-zone", "UTC");
        settings.setString("rest.bind-address", "127.0.0.1");
        settings.setString("rest.address", "127.0.0.1");
        settings.setString("rest.bind-port", "0");
        TableEnvironment flink = TableEnvironment.create(
            EnvironmentSettings.newInstance().inStreamingMode().withConfiguration(settings).build());
        // Parallel readers of one file are out of order by as much as they like; one reads it as it was written.
        flink.executeSql("CREATE TABLE clicks (user_id STRING, event_type STRING, page STRING, product_id STRING, monto DECIMAL(12, 2),"
            + " region STRING, `timestamp` TIMESTAMP(3), WATERMARK FOR `timestamp` AS `timestamp` - INTERVAL '30' SECOND)"
            + " WITH ('connector' = 'filesystem', 'path' = 'file://" + in.resolve("clicks.avro") + "', 'format' = 'avro')");
        String counts = "COUNT(*) FILTER (WHERE event_type = 'click') AS clicks, COUNT(*) FILTER (WHERE event_type = 'purchase') AS purchases,"
            + " COUNT(*) FILTER (WHERE event_type = 'add_to_cart') AS add_to_cart, SUM(monto) AS revenue, COUNT(DISTINCT user_id) AS users";
        StatementSet all = flink.createStatementSet();
        String[][] kinds = {
            {"page_1m", "region, page", "TUMBLE(TABLE clicks, DESCRIPTOR(`timestamp`), INTERVAL '1' MINUTE)"},
            {"region_1m", "region", "TUMBLE(TABLE clicks, DESCRIPTOR(`timestamp`), INTERVAL '1' MINUTE)"},
            {"region_5m", "region", "HOP(TABLE clicks, DESCRIPTOR(`timestamp`), INTERVAL '1' MINUTE, INTERVAL '5' MINUTE)"},
        };
        for (String[] kind : kinds) {
            flink.executeSql("CREATE TABLE " + kind[0] + " (clicks BIGINT, purchases BIGINT, add_to_cart BIGINT, revenue DECIMAL(38, 2), users BIGINT)"
                + " WITH ('connector' = 'filesystem', 'path' = 'file://" + out.resolve(kind[0]) + "', 'format' = 'csv')");
            all.addInsertSql("INSERT INTO " + kind[0] + " SELECT clicks, purchases, add_to_cart, revenue, users FROM (SELECT window_start, " + kind[1]
                + ", " + counts + " FROM TABLE(" + kind[2] + ") GROUP BY window_start, window_end, " + kind[1] + ")");
        }
        // Starting the machine and the cluster is no part of the rate; compiling what runs often is, as it would be in any day's first minute.
        Instant begun = Instant.now();
        Duration cpu = cpu();
        all.execute().await();
        double seconds = Duration.between(begun, Instant.now()).toNanos() / 1e9, used = cpu().minus(cpu).toNanos() / 1e9;
        System.out.println("{\"seconds\": " + seconds + ", \"cpu_seconds\": " + used + "}");
        System.exit(0);
    }

    private static Duration cpu() throws Exception {
        String[] fields = Files.readString(Path.of("/proc/self/stat")).replaceAll(".*\\)", "").trim().split(" ");
        return Duration.ofMillis(10 * (Long.parseLong(fields[11]) + Long.parseLong(fields[12])));
    }
}
